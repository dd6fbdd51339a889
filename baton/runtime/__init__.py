"""Computing. It is the kernels that keep the cores busy: torch's own threads, idle between its few operations, must not spin there. OpenMP
reads how they wait when torch is loaded, so this comes before."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
