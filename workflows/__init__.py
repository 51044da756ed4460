"""Fullfield's verbs: each file is one command, which parses, opens, loops and logs."""
