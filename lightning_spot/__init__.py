"""PyTorch Lightning fine-tunes that survive preemption. The callback is not released yet; see the changelog."""
