"""Programs that others make of models: torch.compile, torch.export, ONNX, TorchScript."""
