"""What a vLLM server needs to take the student's weights from a shared folder; runs inside the server, imports torch alone.

    VLLM_SERVER_DEV_MODE=1 python -m vllm.entrypoints.openai.api_server --model STUDENT \
        --worker-extension-cls moteach.rollouts.vllm_worker.WeightLoader ...

The server's environment must be able to import this file: `pip install --no-deps moteach` there. vLLM's own
`reload_weights` is not enough: it answers that all is well and leaves wrong weights where the kernels keep a packed copy.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch


class WeightLoader:
    """Methods that vLLM adds to its workers; called through `POST /collective_rpc`."""

    model_runner: Any

    def moteach_load(self, folder: str) -> dict[str, Any]:
        """Loads a checkpoint over the weights that are being served, layer by layer.

        Args:
            folder: Checkpoint of the same model in safetensors files, on a disk that this worker sees.

        Returns:
            Number of tensors that were read.
        """
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

        files = sorted(Path(folder).glob("*.safetensors"))
        if not files:
            raise FileNotFoundError(f"expected safetensors files in {folder}, found none; is the folder shared?")
        model = self.model_runner.get_model()
        count = 0

        def tensors() -> Iterator[tuple[str, torch.Tensor]]:
            nonlocal count
            from safetensors import safe_open

            for file in files:
                with safe_open(file, framework="pt") as opened:
                    for name in opened.keys():  # noqa: SIM118
                        count += 1
                        yield name, opened.get_tensor(name)

        with torch.inference_mode():
            initialize_layerwise_reload(model)
            model.load_weights(tensors())
            finalize_layerwise_reload(model, self.model_runner.model_config)
            for module in model.modules():
                # a head tied to the embedding is never loaded itself and would go on with the packed copy of old weights
                if hasattr(module, "cpu_linear") and getattr(module, "weight", torch.empty(0)).numel():
                    module.quant_method.process_weights_after_loading(module)
        return {"tensors": count}
