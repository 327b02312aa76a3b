"""The options of every verb: dataclasses that need the standard library alone.

A verb's dataclass is its command line (each field an option, with its help text), what its saved JSON holds, and what a
run that continues is compared with. Python callers give the same dataclass, checked in the same place.

They stand in one room because `openvla VERB --help` reads them: it may import neither torch nor numpy, which the rooms
that do the work need.
"""
