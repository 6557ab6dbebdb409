"""Puts the recorded results into the package, so that `paperworks list` knows them wherever it is installed."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithResults(build_py):
    """Copies `results/*.json` to `paperworks/_results`; an editable install reads `results/` itself."""

    def run(self) -> None:
        """Build the package and add the results."""
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib) / "paperworks" / "_results"
            target.mkdir(parents=True, exist_ok=True)
            for result in sorted(Path("results").glob("*.json")):
                shutil.copyfile(result, target / result.name)


setup(cmdclass={"build_py": BuildWithResults})
