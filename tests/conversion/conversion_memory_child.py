"""Convert in a process of its own and say how much memory that took.

Arguments: source, layout and destination, again and again. Prints the bytes of each as JSON.
"""

import json
import sys

from scrubjay.conversion.convert import convert
from scrubjay.examples.measuring.memory import high_water

grown = {}
for source, layout, destination in zip(*[iter(sys.argv[1:])] * 3, strict=True):
    before = high_water(reset=True)
    convert(source, destination, to=layout)
    grown[layout] = high_water() - before
sys.stdout.write(json.dumps(grown))
