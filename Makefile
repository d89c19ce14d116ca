# For those who expect `make`. All of it is `./run` and CMake; see ./run help.
PREFIX ?= /usr/local
DESTDIR ?=

all:
	./run build

install: all
	DESTDIR="$(DESTDIR)" cmake --install build --prefix "$(PREFIX)" --strip

# What the last install wrote, and the folders that are ours alone.
uninstall:
	@test -f build/install_manifest.txt || { echo "nothing was installed from here"; exit 1; }
	sed 's|^|$(DESTDIR)|' build/install_manifest.txt | tr '\n' '\0' | xargs -0 rm -f --
	for folder in lib/casemate share/doc/casemate; do \
	    rmdir --ignore-fail-on-non-empty "$(DESTDIR)$(PREFIX)/$$folder"; done

test:
	./run test

clean:
	./run clean

.PHONY: all install uninstall test clean
