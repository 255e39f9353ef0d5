"""The demo and the load test: a whole run of speedlayer on servers of its own, watched, audited and drawn.

Nothing in here runs inside the daemon. The demo starts the daemon as any user would (`speedlayer run FILE`, a child
process), reads it through its control socket, and judges it by what is in the database at the end.
"""
