"""What README.md tells a new user to run, as it stands there."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap

from support import ROOT, Node


def test_the_first_success_of_the_readme(node: Node) -> None:
    section = (ROOT / "README.md").read_text().split("## Python, and inside", 1)[1]
    found = re.search(r"<<'EOF'\n(.*?)\n\s*EOF", section, re.DOTALL)
    assert found is not None
    program = textwrap.dedent(found.group(1)).replace("127.0.0.1:7410", node.address)
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("512 tokens are back")
