"""One file a family: its cases, its peers, its checks."""
