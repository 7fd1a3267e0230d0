"""How torch's threads wait for each other.  To be imported before torch, which asks when it is
loaded.

OpenMP's threads spin while they wait.  So two runs with as many threads as the machine has cores
take each other's time: on two cores seven steps took more than 100 s instead of 17.  Sleeping costs
a run that is alone nothing that could be measured.  Whoever has set OMP_WAIT_POLICY decides.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
