"""Serve a model over HTTP with LitServe: image in, mask out, and a web page to try it.

``POST /predict`` takes the bytes of one image as its body. ``GET /`` is the page, ``GET /info`` lists the classes, and
``GET /health`` says whether the server is ready. A request cannot name a path or a URL: a body that is not an image is
refused.
"""

import json
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Annotated, Any, Literal

import litserve
import numpy as np
import torch
from fastapi import Depends, HTTPException, Query, Request, Response
from fastapi.responses import HTMLResponse
from PIL import Image
from starlette.concurrency import run_in_threadpool

from bisenet import checkpoint
from bisenet.predict import TooLarge, UnusableInput, decode_image
from bisenet.report import overlay


@dataclass
class Posted:
    """A request that has been checked."""

    image: np.ndarray
    """RGB uint8 (H, W, 3)."""
    output: str
    """``mask``, ``overlay`` or ``runs``."""
    alpha: float
    """Opacity of the mask in an overlay, in [0, 1]."""


async def posted(
    request: Request,
    output: Literal["mask", "overlay", "runs"] = "mask",
    alpha: Annotated[float, Query(ge=0, le=1)] = 0.5,
) -> Posted:
    """Read and check a request before it joins a batch: status 413 if it is too large, 400 if it is no image."""
    limits, content = request.app.state, bytearray()
    async for part in request.stream():
        content += part
        if len(content) > limits.max_bytes:
            raise HTTPException(413, f"more than {limits.max_bytes} bytes; accepted: up to so many (max_bytes)")
    try:
        image = await run_in_threadpool(decode_image, bytes(content), "the body", limits.max_pixels)
    except UnusableInput as error:
        raise HTTPException(413 if isinstance(error, TooLarge) else 400, str(error)) from error
    return Posted(image, output, alpha)


class Api(litserve.LitAPI):
    """Segments the images of a batch; images of the same size are predicted together."""

    def __init__(self, path: str, data: dict[str, Any] | None, trust: Sequence[str], **batching: Any) -> None:
        super().__init__(**batching)
        self.path, self.data, self.trust = path, data, trust

    def setup(self, device: str) -> None:
        """Load the model; LitServe calls this in each worker."""
        self.segmenter = checkpoint.read(self.path, self.data).segmenter(trust=self.trust).to(device)

    def decode_request(self, request: Annotated[Posted, Depends(posted)]) -> Posted:
        """Return the request unchanged: :func:`posted` has decoded it."""
        return request

    @torch.inference_mode()
    def predict(self, x: Any) -> Any:
        """Pair each request with its mask, uint8 (H, W); ``x`` is a list of requests, or one if batches have one."""
        requests: list[Posted] = x if isinstance(x, list) else [x]
        masks: dict[int, np.ndarray] = {}
        for size in {request.image.shape for request in requests}:
            same = [i for i, request in enumerate(requests) if request.image.shape == size]
            images = torch.from_numpy(np.stack([requests[i].image for i in same])).permute(0, 3, 1, 2)
            predicted = self.segmenter(images.to(self.segmenter.mean.device)).to("cpu", torch.uint8).numpy()
            masks |= dict(zip(same, predicted, strict=True))
        found = [(request, masks[i]) for i, request in enumerate(requests)]
        return found if isinstance(x, list) else found[0]

    def encode_response(self, output: tuple[Posted, np.ndarray]) -> Response:
        """Encode a mask as a palette PNG of train ids, a PNG of the overlay, or JSON of runs (train id, length)."""
        request, mask = output
        palette = self.segmenter.classes.palette
        if request.output == "runs":
            flat = mask.ravel()
            starts = np.flatnonzero(np.r_[True, flat[1:] != flat[:-1]])
            runs = np.stack([flat[starts], np.diff(np.r_[starts, flat.size])], 1)
            return Response(json.dumps({"size": mask.shape, "runs": runs.tolist()}), media_type="application/json")
        if request.output == "overlay":
            drawn = Image.fromarray(overlay(request.image, mask, palette, request.alpha, edges=True))
        else:
            drawn = Image.fromarray(mask)
            drawn.putpalette(palette.tobytes())  # the values stay the train ids
        drawn.save(encoded := BytesIO(), "PNG")
        return Response(encoded.getvalue(), media_type="image/png")


def make_server(
    path: str,
    data: dict[str, Any] | None = None,
    trust: Sequence[str] = (),
    *,
    accelerator: Literal["cpu", "cuda", "mps", "auto"] = "auto",
    max_batch_size: int = 4,
    batch_timeout: float = 0.01,
    timeout: float = 30.0,
    max_bytes: int = 32 * 2**20,
    max_pixels: float = 2.5e7,
) -> litserve.LitServer:
    """Make the server of a checkpoint. The checkpoint is read here once, so that errors in it appear before the start.

    Args:
        path, trust: as in :func:`bisenet.load`.
        data: as in :func:`bisenet.load`, but a mapping only.
        accelerator: ``auto``, ``cpu``, ``cuda`` or ``mps``.
        max_batch_size: most requests that are predicted together.
        batch_timeout: seconds that a request waits for others to fill its batch.
        timeout: seconds after which a waiting request is given up.
        max_bytes: most bytes of a body; a larger one gets status 413.
        max_pixels: most pixels of an image, read from its header; a larger one gets status 413.

    Raises:
        ValueError: a value that LitServe does not accept, or a file that is no checkpoint.
    """
    segmenter = checkpoint.read(path, data).segmenter(trust=trust)
    api = Api(path, data, trust, max_batch_size=max_batch_size, batch_timeout=batch_timeout)
    classes = [{"name": name, "color": segmenter.classes.palette[i].tolist()}
               for i, name in enumerate(segmenter.classes.names)]  # fmt: skip
    about = {"checkpoint": Path(path).name, "classes": classes, "protocol": next(iter(segmenter.protocols))}
    server = litserve.LitServer(
        api, accelerator=accelerator, devices=1, timeout=timeout, model_metadata=about, disable_openapi_url=True
    )
    server.app.state.max_bytes, server.app.state.max_pixels = max_bytes, max_pixels
    routes = server.app.router.routes
    routes[:] = [route for route in routes if getattr(route, "path", "") != "/"]  # replaces LitServe's own page
    page = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    server.app.add_api_route("/", lambda: HTMLResponse(page, headers=_HEADERS), methods=["GET"])
    return server


_HEADERS = {"Content-Security-Policy": "default-src 'self'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
                                       "img-src blob: data:; media-src blob:"}  # fmt: skip
"""They keep the page from loading anything from other hosts."""


def serve(server: litserve.LitServer, host: str = "127.0.0.1", port: int = 8000) -> None:
    """Run until Ctrl-C or SIGTERM, then end the worker processes. LitServe's errors name a wrong host or port."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # else the workers would live on
    server.run(host=host, port=port, num_api_servers=1, generate_client_file=False, log_level="warning")
