# Stage 1 builds one static binary. Nothing of this stage but that binary reaches the image.
FROM rust:1.95-slim-bookworm AS build
WORKDIR /build
# glibc linked in: the result runs in an empty image and still resolves names through Docker's DNS. A fixed load address
# saves the table of relocations.
ENV CARGO_BUILD_RUSTFLAGS="-C target-feature=+crt-static -C relocation-model=static -C link-arg=-L/build/lib"
# On x86-64 Rust links with LLVM's linker, which can keep one of several functions that are the same: that is 11 kB.
ENV CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUSTFLAGS="$CARGO_BUILD_RUSTFLAGS -C link-arg=-Wl,--icf=all"
# Nothing unwinds through C, and what would be needed for that is 80 kB: this libc goes without.
RUN mkdir lib \
 && objcopy --remove-section .eh_frame --remove-section .rela.eh_frame "$(gcc -print-file-name=libc.a)" lib/libc.a
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
