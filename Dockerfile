# Stage 1 builds one static binary. Nothing of this stage but that binary reaches the image.
FROM rust:1.95-slim-bookworm AS build
WORKDIR /build
# glibc linked in: the result runs in an empty image and still resolves names through Docker's DNS.
ENV RUSTFLAGS="-C target-feature=+crt-static"
# The dependencies have a layer of their own: a change of main.rs does not build them again.
COPY Cargo.toml Cargo.lock ./
RUN echo 'fn main() {}' > main.rs \
 && cargo build --locked --release --target "$(uname -m)-unknown-linux-gnu"
COPY main.rs ./
RUN touch main.rs \
 && cargo build --locked --release --target "$(uname -m)-unknown-linux-gnu" \
 && cp target/*-unknown-linux-gnu/release/kv-store /kv-store

# Stage 2 is the image: the binary and nothing else.
FROM scratch
COPY --from=build /kv-store /kv-store
EXPOSE 8080
# There is no curl in here: the binary asks itself.
HEALTHCHECK --interval=10s --timeout=3s --start-period=2s CMD ["/kv-store", "--health"]
ENTRYPOINT ["/kv-store"]
