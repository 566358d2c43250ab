"""What a lockd and its sequencer must agree on before they speak.

Frames, lockd to sequencer: ["hello", PROTOCOL, node name, incarnation, last place or nil], ["join"],
["send", seq, payload], ["witness", request, witness], ["withdraw", request, key], ["leave", request],
["status", request], ["ping", n], ["pong", n, last place].
Sequencer to lockd: ["welcome", node number, place, recovering], ["expelled", reason], the events of
`group.order`, ["ok", request], ["refused", request, code, message, data], ["status", request, state],
["ping", n], ["pong", n].
"""

from __future__ import annotations

PROTOCOL = 1
SEQUENCER_MODULE = "clustermd.group.sequencer"
