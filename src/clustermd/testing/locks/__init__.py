"""The lock manager on its own, judged: replicas in memory, an independent reading of its rules, seeded storms.

`rules` names every rule and says where it is written. `invariants.Checker` watches one engine (`ledger`, `callbacks`,
`values`, `membership` are its parts); `replicas.Cluster` runs whole replicas over an `order` in memory, with one
`history` for all and a `client` for each session; `storm` draws, replays and shrinks what happens to them.
"""
