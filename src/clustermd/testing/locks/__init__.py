"""The lock manager on its own, judged: replicas in memory, an independent reading of its rules, seeded storms."""
