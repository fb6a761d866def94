"""Several processes that train one model on one machine: rank 0 decides and commits, the others hand it their parts."""
