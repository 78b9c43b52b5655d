"""What a server is doing, for people: one record, and what shows it. Light: no torch, no SGLang."""
