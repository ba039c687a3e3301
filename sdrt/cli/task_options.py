"""What `sdrt run` takes for the tasks beside text-to-image: one option for each field of `Request`."""

from pathlib import Path
from typing import Annotated

import typer

FromPicture = Annotated[
    Path | None,
    typer.Option(
        "--image",
        metavar="IMAGE",
        help="The PNG, JPEG or WebP to work on: to redraw, inpaint, outpaint, enlarge, edit or take the depth of.",
        show_default=False,
    ),
]
Strength = Annotated[
    float | None,
    typer.Option(
        metavar="SHARE",
        help="How much of the steps then runs, above 0 (as it is) to 1 (free). Default: 0.8, with mask or outpaint 1.",
        show_default=False,
    ),
]
Composed = Annotated[
    list[str] | None,
    typer.Option(
        "--and",
        metavar="PROMPT[:WEIGHT]",
        help="Draw this too, guided on its own; again for more. A weight below 0 leads away. Default: 1. "
        "One or two take the room of another image in the bundle's --batch.",
        show_default=False,
    ),
]
MaskFile = Annotated[
    Path | None,
    typer.Option(
        "--mask",
        metavar="IMAGE",
        help="What of the image is drawn anew: white; black keeps what it shows.",
        show_default=False,
    ),
]
MaskMode = Annotated[
    str | None,
    typer.Option(
        metavar="MODE",
        help="diffusers: greys count as black or white; soft: they blend. Default: diffusers.",
        show_default=False,
    ),
]
MaskBlur = Annotated[
    float | None, typer.Option(metavar="PIXELS", help="Of a soft mask. Default: 8.", show_default=False)
]
PaddingMaskCrop = Annotated[
    int | None,
    typer.Option(
        metavar="PIXELS", help="Work on the mask and so many pixels around it alone, in --size.", show_default=False
    ),
]
Preserve = Annotated[
    bool | None,
    typer.Option(
        "--preserve/--no-preserve",
        help="Leave every pixel outside the mask exactly as it is. Default: only with --outpaint.",
        show_default=False,
    ),
]
Outpaint = Annotated[
    str | None,
    typer.Option(
        metavar="SIDE=N,…",
        help="Grow the image by pixels on sides, in windows where it gets large: left=128,bottom=64.",
        show_default=False,
    ),
]
Fill = Annotated[
    str | None,
    typer.Option(
        metavar="HOW",
        help="What is in the new part before: edge, noise or a colour. Default: edge.",
        show_default=False,
    ),
]
DepthFile = Annotated[
    Path | None,
    typer.Option(
        "--depth",
        metavar="FILE",
        help="For depth-to-image bundles: how near each place is, .npy or a grey PNG of 8 or 16 bits. "
        "Default: estimated from --image, where the checkpoint brought an estimator.",
        show_default=False,
    ),
]
NoiseLevel = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="For upscaler bundles: how noisy the small image is made first. Default: 20.",
        show_default=False,
    ),
]
ImageGuidanceScale = Annotated[
    float | None,
    typer.Option(
        metavar="S",
        help="For editing bundles: how close to the image to stay. Default: 1.5.",
        show_default=False,
    ),
]
ControlImages = Annotated[
    list[str] | None,
    typer.Option(
        "--control-image",
        metavar="IMAGE|none",
        help="For bundles with ControlNets: what steers, a picture, or a .npy of what the network is to see; "
        "several: one for each, in their order, or none.",
        show_default=False,
    ),
]
ControlScale = Annotated[
    list[float] | None,
    typer.Option(
        "--control-scale",
        "--controlnet-conditioning-scale",
        metavar="S",
        help="How much it counts; again for each ControlNet. Default: 1.",
        show_default=False,
    ),
]
ControlStart = Annotated[
    list[float] | None,
    typer.Option(
        "--control-start",
        "--control-guidance-start",
        metavar="SHARE",
        help="Steer from this share of the steps on; again for each ControlNet. Default: 0.",
        show_default=False,
    ),
]
ControlEnd = Annotated[
    list[float] | None,
    typer.Option(
        "--control-end",
        "--control-guidance-end",
        metavar="SHARE",
        help="And up to this one; again for each ControlNet. Default: 1.",
        show_default=False,
    ),
]
HiresScale = Annotated[
    float | None,
    typer.Option(
        metavar="X",
        help="Draw in two passes: in --size, then this much larger, from the first as an image.",
        show_default=False,
    ),
]
HiresUpscaler = Annotated[
    str | None,
    typer.Option(
        metavar="HOW",
        help="What enlarges in between: latent, latent-nearest, latent-bicubic, lanczos. Default: latent.",
        show_default=False,
    ),
]
HiresStrength = Annotated[
    float | None,
    typer.Option(metavar="SHARE", help="The --strength of the second pass. Default: 0.7.", show_default=False),
]
HiresSteps = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="The --steps of the second pass, of which that share runs. Default: --steps.",
        show_default=False,
    ),
]
Vae = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="What decodes: full, or tiny, which is fast, where it was built in. Default: full.",
        show_default=False,
    ),
]
Windowed = Annotated[
    bool | None,
    typer.Option(
        "--windowed",
        help="Sizes above the bundle's, in overlapping windows that are one at every step.",
        show_default=False,
    ),
]
