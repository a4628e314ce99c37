# The server, `latteflow serve`, on a CPU or on an NVIDIA GPU. docs/container.md says how to build and run it.
#
#   docker build --tag latteflow:cuda .
#   docker build --tag latteflow --build-arg TORCH_INDEX=... .

ARG PYTHON=3.12

FROM python:${PYTHON}-slim-bookworm AS build
# A package index to take torch from; empty: the ordinary one, which for Linux on x86-64 has the CUDA build. That brings its
# libraries along, and the driver is the host's. For CPUs name the index of CPU wheels: a few GB less.
ARG TORCH_INDEX=
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1 \
    PATH=/opt/latteflow/bin:$PATH
RUN python -m venv /opt/latteflow
WORKDIR /source
COPY constraints.txt ./
# torch comes first and by itself, so that a change of the source does not fetch it again.
RUN pip install --constraint constraints.txt ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch
COPY pyproject.toml README.md LICENSE ./
COPY src src
RUN pip install --constraint constraints.txt ".[serve]"

FROM python:${PYTHON}-slim-bookworm
RUN useradd --uid 10001 --create-home latteflow
COPY --from=build /opt/latteflow /opt/latteflow
ENV PATH=/opt/latteflow/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    HF_HOME=/home/latteflow/models \
    HF_HUB_DISABLE_TELEMETRY=1
# A number, so that whoever runs the image can see that it is not root's; and a folder with nothing in it.
USER 10001
WORKDIR /srv
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=5s --start-period=120s --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/livez', timeout=4)"]
# Listening beyond the container wants a key: LATTEFLOW_API_KEYS, or --api-key-file. None is in the image.
ENTRYPOINT ["latteflow", "serve", "--host", "0.0.0.0", "--port", "8000"]
