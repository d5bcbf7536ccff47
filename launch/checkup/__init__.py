"""The parts of launch/doctor.py: ``start`` runs the checks, ``judge`` compares ranks and nodes, ``findings_table``
prints."""
