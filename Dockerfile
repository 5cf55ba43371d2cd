# A server for the package's run, or for one mounted into it.
#   docker build --tag emollama . && docker run --publish 8000:8000 emollama
# EXTRA is "", "cuda" or "tpu": which JAX is installed.
FROM python:3.11-slim

ARG EXTRA=""
RUN useradd --create-home --uid 10001 emollama
WORKDIR /app
COPY pyproject.toml README.md LICENSE ./
COPY configs configs
COPY benchmarks/torch_sides benchmarks/torch_sides
COPY emollama_jax emollama_jax
RUN pip install --no-cache-dir ".${EXTRA:+[$EXTRA]}"

USER 10001
ENV EMOLLAMA_CACHE=/home/emollama/cache PYTHONUNBUFFERED=1
EXPOSE 8000
# No shell between: SIGTERM must reach the server, which drains.
ENTRYPOINT ["emollama", "serve", "--host", "0.0.0.0"]
