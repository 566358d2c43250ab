"""What `--help` says: in general, and for each mode."""

from __future__ import annotations

from clustermd.cli.options import Mode

_GENERAL = """\
clustermd runs Linux md arrays in userspace, on several machines at once, and serves them over NBD.
It takes the command lines of mdadm(8).

Usage: clustermd --create ARRAY options... DISK...     make a new array and start it
       clustermd --assemble ARRAY options... DISK...   start an array, or join it from another node
       clustermd --detail ARRAY...                     what a running array looks like
       clustermd --stop ARRAY...                       stop an array on this node
       clustermd --wait ARRAY...                       wait until a resync is done
       clustermd --examine DISK...                     what a disk says of its array
       clustermd --examine-bitmap DISK...              its write-intent bitmaps, one per node
       clustermd --query ARRAY|DISK...                 what something is
       clustermd --zero-superblock DISK...             take a disk out of its array for good
       clustermd lock NAME -- COMMAND...               run a command under a lock of the cluster
       clustermd locks [--json]                        who holds and awaits which lock, whole cluster
       clustermd cluster setup|status|fence-ack|...    make a corosync cluster, see how it is, confirm a fencing
       clustermd trace FILE...                         judge what nodes recorded: which layer broke which rule
       clustermd simulate [--seeds A..B]               play simulated clusters through faults, judge every step
       clustermd demo                                  see it survive a crash, in two minutes

ARRAY is a name such as md0 or /dev/md/home; nothing is made in /dev. DISK is a block device or an image file.
This node's state lies in $CLUSTERMD_RUN/$CLUSTERMD_NODE: mdstat, speed_limit_min, speed_limit_max, and per array
its pid, nbd.sock, control.sock and log.

For the options of a mode: clustermd --create --help, clustermd --assemble --help, clustermd --misc --help
For options in general:    clustermd --help-options
"""

_OPTIONS = """\
Options may be bundled (-CR), take their value with or without a blank or '=' (-n2, -n 2, --raid-devices=2), and
long ones may be shortened. The mode comes before options of the mode.

  -h --help            this, or with a mode its own help
  -V --version         the version
  -v --verbose         say more
  -q --quiet           say less
  -b --brief           one line per array (with -D and -E)
  -Y --export          KEY=value lines (with -D and -E)
     --json            one JSON object on standard output
  -f --force           see each mode
     --cluster-engine=ENGINE   local (nodes of this machine) or corosync; may stand before any command. Default:
                       $CLUSTERMD_ENGINE, else what /etc/clustermd.conf says, else local
     --homehost=NAME   the host that names of arrays belong to (default: this node's name)

  -A --assemble  -C --create  -D --detail  -E --examine  -X --examine-bitmap
  -Q --query     -S --stop    -W --wait    --zero-superblock

Exit status: 0 done, 1 refused or failed, 2 not understood.
"""

_CREATE = """\
Usage: clustermd --create ARRAY --level=1 --raid-devices=N options... DISK...

Makes a new array of DISKs and starts it. The word 'missing' stands for a disk that is not there yet. Disks that
carry data or another array are taken only after a question, or with --run.

  -l --level=           1, raid1 or mirror
  -n --raid-devices=    how many disks form the mirror
  -x --spare-devices=   how many more are spares
  -b --bitmap=          clustered: several nodes may run the array at once; internal; none
     --nodes=           how many nodes at once (clustered; default 4)
     --home-cluster=    the cluster it belongs to (default: $CLUSTERMD_CLUSTER, else this machine)
     --bitmap-chunk=    KiB (or K, M, G) that one bit of the bitmap covers
  -d --delay=           seconds after which idle bits are cleared (default 5)
  -z --size=            KiB of each disk to use, or max
     --data-offset=     KiB before the data
  -e --metadata=        1.0, 1.1 or 1.2 (default)
  -N --name=            its name on disk (default: from ARRAY)
  -u --uuid=            its UUID (default: random)
  -R --run              don't ask
  -f --force            with --raid-devices=1
     --assume-clean     the disks are equal already: no first resync

Two nodes must not write the same blocks at the same time: that is for a cluster file system, or one owner per
virtual disk, to see to.
"""

_ASSEMBLE = """\
Usage: clustermd --assemble ARRAY options... DISK...
       clustermd --assemble --scan options... DISK...

Starts an array on this node from its disks. With --scan, every array found on DISKs, under its own name.

  -u --uuid=            take only disks of the array with this UUID
  -N --name=            take only disks of the array with this name
  -R --run              start it although disks are missing
  -f --force            the same, in doubt
  -o --readonly         write nothing: no resync, no lock, no place in the cluster
     --home-cluster=    run an array of this other cluster, which nobody else runs
"""

_MISC = """\
Usage: clustermd ACTION options... ARRAY-or-DISK...

  -D --detail           a running array; -b one line, -Y KEY=value, --json, --scan all of this node
  -t --test             with -D: exit status 0 well, 1 degraded, 2 failed, 4 not known
  -E --examine          superblocks of disks; -b, -Y, --json, --scan one line per array
  -X --examine-bitmap   bitmaps of all nodes on disks
  -Q --query            what something is
  -S --stop             stop arrays on this node; --scan all; refused while NBD clients are connected
  -f --force            with -S: end the clients' requests in flight, then disconnect them
  -W --wait             until no resync is left; success only if there was one
     --zero-superblock  remove superblocks from disks that are not in use
"""

_NOT_OFFERED = "This mode of mdadm is not offered by clustermd.\n"


def help_text(mode: Mode | None) -> str:
    """The help for a mode, or the general one."""
    if mode is None:
        return _GENERAL
    return {Mode.CREATE: _CREATE, Mode.ASSEMBLE: _ASSEMBLE, Mode.MISC: _MISC, Mode.MANAGE: _MISC}.get(
        mode, _NOT_OFFERED
    )


def options_text() -> str:
    """The help of --help-options."""
    return _OPTIONS
