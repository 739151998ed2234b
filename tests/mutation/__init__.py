"""Whether tests notice faults that are put into the core, one by one: ``make mutants``."""
