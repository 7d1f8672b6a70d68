"""Faults in a running deployment, clients that write down every token, and checks of what they wrote."""
