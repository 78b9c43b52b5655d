"""Single measurements, each a command of its own: operations without an engine, and one question
at a time to a server that is started for it.
"""
