"""Answer a column of a CSV file, all rows in one batch: csv_batch.py IN.csv OUT.csv COLUMN"""

import csv
import sys

import labs

if len(sys.argv) != 4:
    sys.exit(__doc__)
source, target, column = sys.argv[1:]
with open(source, newline="", encoding="utf-8-sig") as file:  # -sig: Excel writes a BOM
    reader = csv.DictReader(file)
    columns, rows = reader.fieldnames or (), [{**row, "answer": ""} for row in reader]
if column not in columns:
    sys.exit(f"{source} has no column {column!r}: it has {', '.join(columns) or 'none'}")
if any(None in row for row in rows):
    sys.exit(f"{source} has a row with more cells than columns: quote cells that contain commas")
config = labs.load_config()
model = labs.load_model(config)
asked = [row for row in rows if row[column]]
inputs = [labs.build_inputs(model, prompt=row[column]) for row in asked]
for index, event in labs.stream_batch(model, inputs, config.generation):
    if isinstance(event, labs.Delta):
        asked[index]["answer"] += event.text
    elif isinstance(event, labs.Failed):  # the other rows continue
        asked[index]["answer"] = f"error: {event.error}"
with open(target, "w", newline="", encoding="utf-8") as file:
    writer = csv.DictWriter(file, dict.fromkeys([*columns, "answer"]))
    writer.writeheader()
    writer.writerows(rows)
