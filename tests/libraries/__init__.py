"""Other libraries, run for real: Accelerate, Lightning, PEFT, torchao, FSDP, published models."""
