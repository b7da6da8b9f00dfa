"""python -m benchmarks._pages.evidence"""

from benchmarks._pages.evidence.pages import FOLDER, files

FOLDER.mkdir(exist_ok=True)
for path, content in files().items():
    path.write_text(content)
