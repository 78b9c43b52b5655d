"""The load: when requests arrive, what they ask for, and the clients that send them."""
