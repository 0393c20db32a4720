"""A student as the vision tower of LLaVA-style training: the bridge to EUPE's vision-language evaluations (App. C).

Those evaluations need a language model of 7B and are not run here. Write a student with
`convert/to_torch.py --layout transformers --out FOLDER`, and hand `LlavaVisionTower(FOLDER)` to the training code in
place of its CLIP tower. EUPE feeds 384 pixels at patch 16, the 576 tokens that LLaVA-1.5 takes from CLIP at 336.
"""

from pathlib import Path

import torch
from torch import nn


class LlavaVisionTower(nn.Module):
    """The patch tokens of an exported folder, with the attributes that LLaVA-1.5 asks its vision tower for.

    Class and storage tokens are left out: `transformers`' own LLaVA drops one token at most, and would pass the storage
    tokens to the language model as if they were places in the image. The tower is frozen, as LLaVA-1.5 keeps it.

    Attributes:
      hidden_size: width of the tokens.
      image_processor: makes pixels of pictures, at `resolution`.

    Raises:
      OSError, ValueError: no such folder, or nothing that transformers can load. ImportError: transformers is missing.
    """

    def __init__(self, folder: str | Path, resolution: int | None = None) -> None:
        super().__init__()
        import transformers

        # The folder names a processor that needs torchvision; this one does the same with Pillow.
        processor = getattr(transformers, "ViTImageProcessorPil", None) or transformers.ViTImageProcessor
        self.model = transformers.AutoModel.from_pretrained(folder, local_files_only=True).eval().requires_grad_(False)
        self.image_processor = processor.from_pretrained(folder, local_files_only=True)
        self.config, self.is_loaded = self.model.config, True
        widths = getattr(self.config, "hidden_sizes", None)
        self.hidden_size = widths[-1] if widths else self.config.hidden_size
        self._stride = 4 * 2 ** (len(widths) - 1) if widths else self.config.patch_size
        self.resolution = resolution or self.config.image_size
        if self.resolution % self._stride:
            raise ValueError(f"resolution {self.resolution} is not a multiple of {self._stride}")
        self.image_processor.size = {"height": self.resolution, "width": self.resolution}
        self.image_processor.crop_size = self.image_processor.size  # LLaVA sizes its blank images by it

    def load_model(self, **_: object) -> None:
        """Nothing left to do: LLaVA calls it on towers that load late."""

    @property
    def num_patches_per_side(self) -> int:
        """Patch tokens along one side."""
        return self.resolution // self._stride

    @property
    def num_patches(self) -> int:
        """Patch tokens of an image."""
        return self.num_patches_per_side**2

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.model.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.device

    def train(self, mode: bool = True) -> "LlavaVisionTower":
        """Stays in evaluation mode: training mode would rescale the RoPE coordinates of a frozen tower."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, pixels_Bx3xHxW: torch.Tensor | list[torch.Tensor]) -> torch.Tensor | list[torch.Tensor]:
        """[B, 3, H, W], pixel-normalised -> [B, h * w, D] patch tokens after the final norm, rows from the top left.

        A list of images [3, H, W] of any sizes gives a list of [1, h * w, D].
        """
        if isinstance(pixels_Bx3xHxW, list):
            return [self(image[None]) for image in pixels_Bx3xHxW]
        count = (pixels_Bx3xHxW.shape[2] // self._stride) * (pixels_Bx3xHxW.shape[3] // self._stride)
        tokens = self.model(pixels_Bx3xHxW.to(self.device, self.dtype)).last_hidden_state
        return tokens[:, -count:].to(pixels_Bx3xHxW.dtype)
