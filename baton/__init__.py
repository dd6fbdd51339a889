"""Baton: disaggregated LLM serving. The library; the processes live in `services`."""

import os

__version__ = "0.1.0"

# Before gRPC is imported, which reads it then. What our processes start are programs of their own; gRPC's handlers would bring its threads
# up in the child until it is one, and now and then abort it there.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
