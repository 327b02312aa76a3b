"""Where a model runs."""


def torch_device(choice: str) -> str:
    """What torch calls the device "auto", "cpu" or "cuda"; a `ValueError` where there is no GPU to choose."""
    import torch

    available = torch.cuda.is_available()
    if choice == "cuda" and not available:
        raise ValueError("device='cuda': torch finds no GPU it can use here; device=cpu works everywhere.")
    if choice == "auto":
        return "cuda" if available else "cpu"
    return choice
