# SPDX-License-Identifier: Apache-2.0
"""labs-api with a tiny embedding model, `bert`, and a tiny cross-encoder, `cross`.

python tests/clients/encoders.py FOLDER [options of labs-api]
"""

from __future__ import annotations

import sys
from pathlib import Path

import transformers

import labs_cli

sys.path.insert(0, str(Path(__file__).parent.parent))
import kit

TABLES = """
default_model = "bert"
[models.bert]
model_name = "{0}"
kind = "embedding"
[models.cross]
model_name = "{1}"
kind = "rerank"
"""

if __name__ == "__main__":
    folder, *options = sys.argv[1:]
    place = Path(folder).absolute()
    cross = kit.save_encoder(
        place / "cross", transformers.BertForSequenceClassification, num_labels=1
    )
    tables = TABLES.format(kit.save_encoder(place / "bert"), cross)
    (place / "labs.toml").write_text(tables)
    sys.argv = ["labs-api", "--config", str(place / "labs.toml"), *options]
    labs_cli.main_api()
