"""What a session and its lockd say to each other, around the lock manager's own frames.

Session to lockd: ["hello", {"version", "label"}] first; ["witness", witness], ["dlm", frame], ["status"],
["goodbye"], ["ping", n], ["pong", n].
Lockd to session: ["waiting", why] while the node is not in the group yet, then ["welcome", {"node", "name",
"incarnation", "session", "suspended"}]; ["witness-ok"], ["refused", code, message, data], ["dlm", frame],
["status", state], ["bye"], ["suspended", why], ["resumed"], ["ping", n], ["pong", n]; ["over", why] is the last word
of a life that the cluster has ended. Anybody may ask ["fence-ack", node]: ["fence-acked", words] or "refused".

"witness" and "goodbye" are answered in the order in which they were asked, "status" by itself. A witness with
a known key replaces the one before: an array that opens one more disk registers all of them again.
"""

from __future__ import annotations

PROTOCOL = 1
LOCKD_MODULE = "clustermd.lockd"
