"""Any TRL trainer as a stage."""
