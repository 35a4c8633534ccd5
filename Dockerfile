# abliterate with CUDA.  Build: docker build -t abliterate .
# Run, as yourself, so that the results are yours; the cache is the one that you have, with its login:
#   docker run --rm --gpus all --user "$(id -u):$(id -g)" -v "$PWD:/work" -v "$HOME/.cache/huggingface:/hub" \
#     abliterate run MODEL --out out
FROM python:3.12-slim-bookworm

# Triton compiles the launchers of its kernels, which FP8 and MXFP4 models run on a GPU: gcc, and the headers of libc.
RUN apt-get update \
 && apt-get install --yes --no-install-recommends gcc libc6-dev \
 && rm -rf /var/lib/apt/lists/*

ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore PIP_DISABLE_PIP_VERSION_CHECK=1

# torch brings its own CUDA.  Where the driver is too old for that of PyPI, choose another:
#   docker build --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu129 -t abliterate .
# A layer of its own, so that a change of the code does not fetch it again.
ARG TORCH_INDEX=""
COPY constraints.txt /src/
RUN pip install ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} --constraint /src/constraints.txt torch

COPY pyproject.toml README.md LICENSE /src/
COPY abliterate /src/abliterate
COPY recipes /src/recipes
RUN pip install --constraint /src/constraints.txt '/src[lora,datasets,eval,search]'

# Any user may be given by --user, also one without an entry in /etc/passwd: torch asks for a name, others for a home.
# A volume, because weights that are read past the page cache should not lie on the layers of the container.
RUN useradd --uid 1000 abliterate && mkdir --mode=1777 /hub /work
ENV USER=abliterate HOME=/tmp HF_HOME=/hub
# What NVIDIA's own images set, for runtimes that ask the image.
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
VOLUME /hub
WORKDIR /work
USER abliterate
RUN abliterate plan tiny-chat

# `docker stop` as Ctrl-C: as the first process of a container, Python ignores SIGTERM.  The same command continues.
STOPSIGNAL SIGINT
ENTRYPOINT ["abliterate"]
CMD ["--help"]
