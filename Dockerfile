# abliterate with CUDA.  Build: docker build -t abliterate .
# Run: docker run --rm --gpus all -v "$PWD:/work" -v "$HOME/.cache/huggingface:/hub" abliterate run MODEL --out /work/out
FROM pytorch/pytorch:2.9.1-cuda12.8-cudnn9-runtime

ENV HF_HOME=/hub PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore

# torch is in the image: the rest of the constraints pins what is installed beside it.
COPY pyproject.toml README.md LICENSE constraints.txt /src/
COPY abliterate /src/abliterate
COPY recipes /src/recipes
RUN sed '/^torch==/d' /src/constraints.txt > /tmp/constraints.txt \
 && pip install --constraint /tmp/constraints.txt '/src[lora,datasets,eval]' \
 && rm -rf /src /tmp/constraints.txt \
 && abliterate --version

WORKDIR /work
ENTRYPOINT ["abliterate"]
CMD ["--help"]
