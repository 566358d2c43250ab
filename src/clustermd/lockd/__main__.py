"""`python -m clustermd.lockd`: this node's lock and membership daemon."""

from clustermd.lockd.daemon import main

if __name__ == "__main__":
    main()
