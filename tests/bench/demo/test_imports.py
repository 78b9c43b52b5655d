from __future__ import annotations

import subprocess
import sys


def test_the_demo_loads_no_engine_and_no_plotting_before_it_needs_them() -> None:
    code = (
        "import sys, conserve_sgl.bench.demo.__main__; "
        "print(*{'torch', 'sglang', 'matplotlib'}.intersection(sys.modules))"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == ""
