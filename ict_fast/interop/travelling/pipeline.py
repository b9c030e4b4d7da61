"""A pipeline for consistency models trained with ict-fast; travels with the exported weights.

Needs torch and diffusers alone. Load it with
`DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)`.
"""

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor


class ICTPipeline(DiffusionPipeline):
    """Images in one step, or in several: x = f(x + sqrt(tau^2 - sigma_min^2) z, tau) for each further tau.

    The noise levels come from the scheduler's configuration (CMStochasticIterativeScheduler); its time steps
    are not used, so the further levels may have any value.
    """

    model_cpu_offload_seq = "unet"

    def __init__(self, unet, scheduler):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    def denoise(self, x, sigma, labels=None):
        """The consistency function f(x, sigma)."""
        settings, boundary = self.scheduler.config, self.unet.config.boundary_sigma
        data, low = settings.sigma_data, settings.sigma_min if boundary is None else boundary
        sigma = torch.tensor(float(sigma), dtype=torch.float32, device=x.device)
        total = (sigma**2 + data**2).sqrt()
        timestep = 250 * (sigma + 1e-44).log()
        output = self.unet((x / total).to(self.unet.dtype), timestep, labels, return_dict=False)[0]
        return data**2 / ((sigma - low) ** 2 + data**2) * x + data * (sigma - low) / total * output.float()

    @torch.no_grad()
    def __call__(
        self,
        batch_size=1,
        class_labels=None,
        sigmas=None,
        num_inference_steps=1,
        generator=None,
        latents=None,
        noises=None,
        output_type="pil",
        return_dict=True,
    ):
        """Makes images.

        Args:
            batch_size: their number.
            class_labels: (N,) integers, or a list, for a class-conditional model; by default each in turn.
            sigmas: noise levels of the steps after the first, descending. By default none, or with
                num_inference_steps=2 the model's second level.
            num_inference_steps: 1 or 2; `sigmas` go first.
            generator: of the noise.
            latents: (N, C, H, W) noise of unit variance of the first step.
            noises: the same for each further step.
            output_type: "pil", "np" (N, H, W, C) in [0, 1] or "pt" (N, C, H, W) in [0, 1].
        """
        device, settings, unet = self._execution_device, self.scheduler.config, self.unet.config
        if sigmas is None:
            if num_inference_steps not in (1, 2):
                raise ValueError("more than two steps need their levels: sigmas=[...]")
            sigmas = [unet.second_sigma] if num_inference_steps == 2 else []
        labels = None
        if unet.num_class_embeds:
            if class_labels is None:
                class_labels = torch.arange(batch_size) % unet.num_class_embeds
            labels = (
                torch.as_tensor(class_labels, dtype=torch.int64).reshape(-1).expand(batch_size).to(device)
            )
        shape = (batch_size, unet.in_channels, unet.sample_size, unet.sample_size)
        x = torch.zeros(shape, device=device)
        for number, sigma in enumerate((settings.sigma_max, *sigmas)):
            given = latents if number == 0 else None if noises is None else noises[number - 1]
            noise = randn_tensor(shape, generator=generator, device=device) if given is None else given
            scale = sigma if number == 0 else (sigma**2 - settings.sigma_min**2) ** 0.5
            x = self.denoise(x + scale * noise.to(device), sigma, labels)
            if settings.clip_denoised:
                x = x.clamp(-1, 1)
        images = (x / 2 + 0.5).clamp(0, 1)
        if output_type != "pt":
            images = images.cpu().permute(0, 2, 3, 1).numpy()
        if output_type == "pil":
            images = self.numpy_to_pil(images)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)
