"""A model behind HTTP, by LitServe: an image in, a mask out, and a page to look at it in.

``POST /predict`` takes the bytes of one image as its body. ``GET /`` is the page, ``GET /info`` says which classes
there are, ``GET /health`` whether it is ready. A request names no path and no URL: it is an image or is refused.
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
    """One request, checked."""

    image: np.ndarray
    """RGB uint8 (H, W, 3)."""
    output: str
    alpha: float


async def posted(
    request: Request,
    output: Literal["mask", "overlay", "runs"] = "mask",
    alpha: Annotated[float, Query(ge=0, le=1)] = 0.5,
) -> Posted:
    """Read a request, before it meets the others of its batch: 413 for one that is too large, 400 for no image."""
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
    """Segments the images of a batch, those of one size at once."""

    def __init__(self, path: str, data: dict[str, Any] | None, trust: Sequence[str], **batching: Any) -> None:
        super().__init__(**batching)
        self.path, self.data, self.trust = path, data, trust

    def setup(self, device: str) -> None:
        """Load the model, in each worker."""
        self.segmenter = checkpoint.read(self.path, self.data).segmenter(trust=self.trust).to(device)

    def decode_request(self, request: Annotated[Posted, Depends(posted)]) -> Posted:
        """Nothing is left to do."""
        return request

    @torch.inference_mode()
    def predict(self, x: Any) -> Any:
        """Requests, or one of them -> each with its mask, uint8 (H, W)."""
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
        """PNG whose values are train ids, in the colours of the classes; PNG of the overlay; or JSON of runs."""
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
    """The server of a checkpoint, which is read once before, so that its mistakes are answered here.

    Args:
        path, data, trust: as :func:`bisenet.checkpoint.load` takes them.
        accelerator: ``auto``, ``cpu``, ``cuda`` or ``mps``.
        max_batch_size: requests that are predicted at once.
        batch_timeout: seconds that a request waits for others.
        timeout: seconds after which a request that still waits is given up.
        max_bytes: of a body; a larger one is answered by 413.
        max_pixels: of an image, told from its header; likewise.

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
    routes[:] = [route for route in routes if getattr(route, "path", "") != "/"]  # LitServe says there that it runs
    page = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    server.app.add_api_route("/", lambda: HTMLResponse(page, headers=_HEADERS), methods=["GET"])
    return server


_HEADERS = {"Content-Security-Policy": "default-src 'self'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
                                       "img-src blob: data:; media-src blob:"}  # fmt: skip
"""A page that loads nothing from elsewhere."""


def serve(server: litserve.LitServer, host: str = "127.0.0.1", port: int = 8000) -> None:
    """Run until Ctrl-C or SIGTERM, and end the processes that were started; LitServe's own errors name host or port."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # else its workers would live on
    server.run(host=host, port=port, num_api_servers=1, generate_client_file=False, log_level="warning")
