# What a person or CI runs. Everything installs what it needs, on Debian 12
# with Go, gcc, make and git.

GO       ?= go
BIN      := bin
VERSION  ?= $(shell git describe --tags --always --dirty 2>/dev/null)
LDFLAGS  := -X github.com/tidemark-cdp/tidemark/cmd/internal/build.version=$(VERSION)
PACKAGES := qemu-utils libnbd-bin python3-libnbd nbdkit fio e2fsprogs xfsprogs btrfs-progs dosfstools mtools ntfs-3g fdisk lvm2 fuse3 util-linux iproute2 iputils-ping
GUEST    := qemu-system-x86 busybox-static cpio debootstrap kmod guestmount guestfish libguestfs-xfs
SERVERS  := qemu-guest-agent postgresql mariadb-server redis-server libvirt-daemon libvirt-daemon-driver-qemu libvirt-clients
FUZZTIME ?= 10s
SEEDS    ?= 600
SOAK     ?= 1h

.PHONY: build deps guest-deps test test-guest test-long soak fuzz bench bench-markers bench-back bench-replica bench-history lint demo clean

build:
	$(GO) build -ldflags '$(LDFLAGS)' -o $(BIN)/ ./cmd/tidemark ./cmd/tidemarkd
	CGO_ENABLED=0 $(GO) build -ldflags '$(LDFLAGS)' -o $(BIN)/ ./cmd/tidemark-guest

# deps installs the peers and tools that tests, benchmarks and demo use.
deps:
	@testdata/install-packages $(PACKAGES)

# guest-deps also makes the guests that tests boot in QEMU, a small one and Debian with PostgreSQL, and
# installs, without starting them, the servers that hooks are tested with.
guest-deps: deps
	@testdata/install-packages $(GUEST) $(SERVERS)
	@testdata/guest-image .cache/guest
	@testdata/guest-debian .cache/debian

# test runs everything that fits some minutes. Tests that need what a machine
# may lack (root, FUSE, loop devices, QEMU) skip by name where it is absent.
test: guest-deps
	$(GO) vet ./...
	$(GO) test -race -timeout 40m $(TESTFLAGS) ./...
	$(GO) test -timeout 10m ./journal -run 'TestModel|TestVerifyFindsEveryFlippedBit' -model.seeds=$(SEEDS) -verify.flips=200
	$(MAKE) fuzz FUZZTIME=2000x

# test-guest runs the tests of guests alone: real ones in QEMU and libvirt, hooks with real servers.
test-guest: guest-deps
	$(GO) test -race -timeout 20m $(TESTFLAGS) ./guest
	$(GO) test -race -timeout 20m $(TESTFLAGS) ./cmd/tidemarkd -run 'Guest|Markers|Libvirt'

# test-long is for a night: more seeds, more kills, more corrupt images, more fuzzing.
test-long: guest-deps
	$(GO) test -timeout 8h ./journal -run TestModel -model.seeds=20000
	TIDEMARK_KILLS=200 $(GO) test -race -timeout 2h ./cmd/tidemarkd -run TestKill
	FLIPS=2000 $(GO) test -timeout 4h ./restore/guestfs -run TestCorrupt
	$(MAKE) fuzz FUZZTIME=5m

# soak has everything at work at once for an hour, or SOAK: load, markers, retention, compaction, verification, a replica that comes and goes, kills.
soak: guest-deps
	SOAK=$(SOAK) $(GO) test -race -timeout 24h ./cmd/tidemarkd -run TestSoak -v

fuzz:
	@set -e; for p in ./fuzz ./cmd/internal/config; do \
		for f in $$($(GO) test -list 'Fuzz.*' $$p | grep ^Fuzz); do \
			echo "fuzz $$p $$f"; $(GO) test $$p -run '^$$' -fuzz "^$$f\$$" -fuzztime $(FUZZTIME); done; done

# bench compares with qemu-nbd and nbdkit and rewrites docs/BENCHMARKS.md.
bench: deps build
	$(GO) run ./cmd/internal/bench -out docs/BENCHMARKS.md

# bench-markers measures how long markers freeze a guest, and rewrites that part of the page.
bench-markers: deps build
	$(GO) run ./cmd/internal/bench -markers -out docs/BENCHMARKS.md

# bench-back measures restores, scratch exports and mounts, as root, and rewrites that part of the page.
bench-back: guest-deps build
	testdata/libguestfs $(GO) run ./cmd/internal/bench -back -out docs/BENCHMARKS.md

# bench-replica measures replication, as root, and rewrites that part of the page.
bench-replica: guest-deps build
	$(GO) run ./cmd/internal/bench -replica -out docs/BENCHMARKS.md

# bench-history measures what history takes and what many groups cost, as root, and rewrites that part of the page.
bench-history: guest-deps build
	$(GO) run ./cmd/internal/bench -history -out docs/BENCHMARKS.md

lint:
	@test -z "$$(gofmt -l .)" || { gofmt -l .; exit 1; }
	$(GO) vet ./...
	$(GO) tool -modfile=tools.mod golangci-lint run ./...
	$(GO) tool -modfile=tools.mod govulncheck ./...

demo: deps build
	testdata/demo

clean:
	rm -rf $(BIN) .cache
