// What widgets of Python cannot do: keys, the clipboard, scrolling, and roles for a screen reader.
// Runs once for each box on the page, when its style has loaded; `root` is the box's outermost element.
(root => {
    if (!root || root.dataset.ready) return;
    root.dataset.ready = "yes";
    const find = (name, box = root) => box.querySelector(".helpers-chat-" + name);
    const focusEntry = () => find("entry textarea").focus({preventScroll: true});
    const isVisible = element => element && element.offsetParent !== null;
    const SEND = "\u001e"; // behind a text: send it. One message, so that nothing can come between the two
    const PATIENCE = 5000; // milliseconds
    let atEnd = true, focused = null;

    const send = (text, box) => {
        if (isVisible(find("stop", box)) || !text.value.trim() || text.readOnly) return;
        text.value += SEND;
        text.readOnly = true; // until the kernel has taken it, so that nothing is typed that it would clear
        text.dispatchEvent(new Event("change", {bubbles: true}));
        const sent = text.value;
        const release = () => {
            if (!text.value.endsWith(SEND)) text.readOnly = false;
            else if (text.isConnected) setTimeout(release, 20);
        };
        release();
        setTimeout(() => {
            if (text.value === sent) find("status .widget-html-content", box).textContent =
                "The kernel does not answer yet: it is busy with a cell, or it was started anew. In that case run this cell again.";
        }, PATIENCE);
    };

    // At the window, because JupyterLab looks at keys before a box could, and runs the cell on Shift+Enter. Once for
    // all boxes, and so for none that has gone.
    const onKey = event => {
        const box = event.target.closest?.(".helpers-chat");
        const isComposing = event.isComposing || event.keyCode === 229; // a key of an input method, not of ours
        if (!box || isComposing) return;
        const text = find("entry textarea", box);
        // a notebook takes keys for commands, also letters: "dd" would delete the cell
        if (!event.ctrlKey && !event.metaKey && !event.altKey) event.stopPropagation();
        if (event.key === "Escape") {
            const button = [find("stop", box), find("cancel", box)].find(isVisible);
            if (button) button.click();
        } else if (event.key === "Enter" && event.target === text) {
            if (event.shiftKey) return;
            event.preventDefault();
            send(text, box);
        }
    };
    if (!window.helpersChat) window.addEventListener("keydown", onKey, true);
    window.helpersChat = true;

    const copy = async text => {
        try {
            await navigator.clipboard.writeText(text);
        } catch { // not allowed in every frame; the old way often is
            const field = document.body.appendChild(document.createElement("textarea"));
            field.value = text;
            field.select();
            document.execCommand("copy");
            field.remove();
        }
    };

    root.addEventListener("click", async event => {
        const button = event.target.closest("button");
        if (!button) return;
        if (button.dataset.copy !== undefined) {
            await copy(button.dataset.copy);
            if (button.textContent !== "Copy") return;
            const label = button.ariaLabel;
            button.textContent = button.ariaLabel = "Copied";
            setTimeout(() => [button.textContent, button.ariaLabel] = ["Copy", label], 1500);
        } else if (!button.classList.contains("widget-toggle-button")) {
            atEnd = atEnd || button.classList.contains("helpers-chat-asks");
            focusEntry();
        }
    });

    // A button that has the focus and is hidden loses it to the whole page: then the field gets it.
    root.addEventListener("focusin", ({target}) => focused = target);

    // Whoever has scrolled up stays there; whoever is at the end, or asks, is taken along.
    root.addEventListener("scroll", ({target: log}) => {
        if (log === find("log")) atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 2;
    }, true);
    root.addEventListener("change", () => atEnd = atEnd || find("entry textarea").readOnly);

    const settle = () => {
        const log = find("log");
        if (!log) return;
        if (!log.hasAttribute("role")) {
            log.setAttribute("role", "region");
            log.setAttribute("aria-label", "Conversation");
            log.tabIndex = 0; // so that keys can scroll it
            new ResizeObserver(settle).observe(log);
            root.setAttribute("role", "group");
            root.setAttribute("aria-label", "Chat");
        }
        find("status")?.setAttribute("role", "status");
        if (atEnd) log.scrollTop = log.scrollHeight;
        if (focused && !isVisible(focused) && [focused, document.body].includes(document.activeElement)) focusEntry();
    };
    new MutationObserver(settle).observe(root, {childList: true, subtree: true, attributeFilter: ["style"]});
    settle();
})(this.closest(".helpers-chat"));
