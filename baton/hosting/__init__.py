"""How a process of the cluster is hosted: gRPC server, health, lease, drain, and the worker service over an engine."""
