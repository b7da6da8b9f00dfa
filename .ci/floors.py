"""Prints the oldest versions that pyproject.toml declares, as pins for pip.

python -m pip install -e '.[test]' $(python .ci/floors.py)
"""

import pathlib
import tomllib

path = pathlib.Path(__file__).parents[1] / "pyproject.toml"
project = tomllib.loads(path.read_text())["project"]
extras = project["optional-dependencies"]
floors = [*project["dependencies"], *extras["flax"], *extras["orbax"]]
print(*(floor.replace(">=", "==") for floor in floors))
