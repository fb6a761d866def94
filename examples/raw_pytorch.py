"""A plain PyTorch loop on the core, without any trainer: the third adapter, in one file.

    python examples/raw_pytorch.py --remote runs/raw/remote/raw --local runs/raw/local
Kill it at any moment and run it again: it continues, and ends with the weights of a run that was never killed.
"""

from __future__ import annotations

import argparse

import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from spot_core.config import SpotConfig
from spot_core.data.position import DataPosition, DataState
from spot_core.handover import Capture
from spot_core.opening import open_session
from spot_core.snapshot import rng
from spot_core.snapshot.files import BytesFile, SafetensorsFile, TorchFile, everything, torch_bytes
from spot_core.snapshot.fingerprint import of_tensors
from spot_core.store.identity import RunIdentity

BATCH, EPOCHS = 16, 200


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--remote", required=True)
    parser.add_argument("--local")
    options = parser.parse_args()

    # What any script has: a model, an optimizer, shuffled data, dropout.
    torch.manual_seed(0)
    inputs = torch.randn(1000, 20)
    data = TensorDataset(inputs, inputs.sin().sum(1, keepdim=True))
    loader = DataLoader(data, batch_size=BATCH, shuffle=True)
    model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS * len(loader))

    # 1. Open the run: this checks the place, restores and claims a life.
    config = SpotConfig.resolve(vars(options), fallback_local=".spot")
    identity = RunIdentity("pytorch", {"batch size": BATCH, "samples": len(data)})
    session = open_session(config, identity, device=torch.device("cpu"))
    position = DataPosition()
    position.track(loader)
    step, resumed = 0, None
    # 2. Load what it restored: verified files on this machine.
    if session.resume is not None:
        folder = session.resume.folder / session.resume.manifest.native
        model.load_state_dict(load_file(folder / "model.safetensors"))
        optimizer.load_state_dict(torch.load(folder / "optimizer.pt", weights_only=True))
        schedule.load_state_dict(torch.load(folder / "schedule.pt", weights_only=True))
        resumed = DataState.from_portable(torch.load(session.resume.folder / "data.pt", weights_only=True))
        step = session.resume.manifest.step
    if session.is_finished(EPOCHS * len(loader)):
        session.close()
        print(f"finished at step {step}: weights {of_tensors(model.state_dict().items())}")
        return

    def capture() -> Capture:  # everything that the next life needs, in files of one's own choice
        native, here = f"step-{step}", position.state(step % len(loader), rng.capture())
        return Capture(
            step=step,
            epoch=step / len(loader),
            native=native,
            max_steps=EPOCHS * len(loader),
            files=[
                SafetensorsFile(path=f"{native}/model.safetensors", tensors=model.state_dict()),
                TorchFile(path=f"{native}/optimizer.pt", tree=optimizer.state_dict()),
                TorchFile(path=f"{native}/schedule.pt", tree=schedule.state_dict(), is_volatile=everything),
                BytesFile(path="data.pt", content=lambda: torch_bytes(here.to_portable())),
            ],
        )

    # 3. Train, telling the session where steps begin and end.
    session.begin()
    try:
        for epoch in range(step // len(loader), EPOCHS):
            if resumed is not None and resumed.batches == 0:
                rng.restore(resumed.step)
            position.epoch_begins(is_first=epoch == 0)
            if resumed is not None and resumed.batches > 0:
                position.resume(resumed, skips_here=True)
            skipped, resumed = resumed.batches if resumed is not None else 0, None
            for number, (features, target) in enumerate(loader, start=skipped):
                position.settle()
                loss = nn.functional.mse_loss(model(features), target)
                loss.backward()
                session.before_optimizer_step()
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                step += 1
                position.mark_boundary(number + 1)
                session.step_completed(step)
                if number + 1 < len(loader):  # an epoch's last step is taken up by `finish` or the next one
                    session.at_boundary(capture)
        session.finish(capture)
        session.wait_drained()
    except BaseException as error:
        session.close(error)
        raise
    session.close()
    print(f"finished at step {step}: weights {of_tensors(model.state_dict().items())}")


if __name__ == "__main__":
    main()
