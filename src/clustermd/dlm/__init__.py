"""The distributed lock manager: a replicated state machine over a process group."""
