"""What launch/doctor.py is made of: ``start`` runs the checks, ``judge`` compares ranks and nodes, ``table`` shows."""
