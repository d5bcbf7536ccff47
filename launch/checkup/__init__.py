"""Parts of launch/doctor.py: ``start`` runs the checks, ``judge`` compares ranks and nodes, ``findings_table`` prints
the findings."""
