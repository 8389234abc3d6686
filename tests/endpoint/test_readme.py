"""What README.md tells the owner of an OpenAI application to run, as it stands there."""

import re
import subprocess
import sys
import textwrap

from node import BLOCK, ROOT, NodeTest, stored


class Readme(NodeTest):
    def program(self):
        section = (ROOT / "README.md").read_text().split("## An application that already speaks OpenAI\n", 1)[1]
        found = re.search(r"<<'END'\n(.*?)\n *END\n", section.split("\n## ", 1)[0], re.DOTALL)
        self.assertIsNotNone(found)
        text = textwrap.dedent(found.group(1))
        self.assertEqual(text.count("http://127.0.0.1:7411"), 1)
        # Of all that stands there only the port is another.
        return text.replace("http://127.0.0.1:7411", self.node.http)

    def run_it(self):
        run = subprocess.run([sys.executable, "-c", self.program()], cwd=ROOT, capture_output=True, text=True, timeout=120)
        self.assertEqual(run.returncode, 0, run.stderr)
        said = re.fullmatch(r"(\d+) prompt tokens, (\d+) from the cache\n", run.stdout)
        self.assertIsNotNone(said, run.stdout)
        return int(said[1]), int(said[2])

    def test_the_openai_program_is_cached_the_second_time(self):
        prompt, cached = self.run_it()
        self.assertEqual(cached, 0)
        stored()
        again, cached = self.run_it()
        self.assertEqual((again, cached), (prompt, (prompt - 1) // BLOCK * BLOCK))
        self.assertGreater(cached, 10 * BLOCK)
