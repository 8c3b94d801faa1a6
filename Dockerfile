# docker build -t mmfeat . && docker run --rm -v "$PWD:/work" mmfeat extract --data mvsa --encoders hashing,hog
FROM python:3.11-slim

RUN useradd --create-home --uid 1000 mmfeat
WORKDIR /opt/mmfeat
COPY pyproject.toml README.md LICENSE constraints.txt ./
COPY mmfeat mmfeat

# Torch for the CPU; for a GPU name the index of your driver's CUDA: --build-arg TORCH=https://download.pytorch.org/whl/cu126
ARG TORCH=https://download.pytorch.org/whl/cpu
RUN pip install --no-cache-dir -c constraints.txt --extra-index-url "$TORCH" .

USER mmfeat
WORKDIR /work
ENTRYPOINT ["mmfeat"]
