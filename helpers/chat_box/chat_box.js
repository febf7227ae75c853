// What the widgets of ipywidgets cannot do: keys, the clipboard, scrolling, the direction of typed text, and roles for
// screen readers.
// Runs once for each box on the page, when the box's style has loaded. `root` is the box's outermost element.
(root => {
    if (!root || root.dataset.ready) return;
    root.dataset.ready = "yes";
    const find = (name, box = root) => box.querySelector(".helpers-chat-" + name);
    const focusEntry = () => find("entry textarea").focus({preventScroll: true});
    const isVisible = element => element && element.offsetParent !== null;
    // At the end of a text: what to do with it. The kernel could get a click before the text, because ipywidgets holds a
    // change back until the kernel has handled the one before.
    const ACTIONS = {send: "\u001e", edit: "\u001d", cancel: "\u001c"};
    const isTaken = text => !Object.values(ACTIONS).includes(text.slice(-1));
    const PATIENCE = 5000; // milliseconds
    let end = 0; // the log's scrollTop at its end, when it was drawn last
    let isAsking = false, focused = null;

    const act = (action, box) => {
        const text = find("entry textarea", box);
        if (text.readOnly) return;
        if (action === "send" && (isVisible(find("stop", box)) || !text.value.trim())) return;
        text.value += ACTIONS[action];
        text.readOnly = true; // until the kernel has taken the text, because it changes the field then
        text.dispatchEvent(new Event("change", {bubbles: true}));
        const sent = text.value;
        const release = () => {
            if (isTaken(text.value)) text.readOnly = false;
            else if (text.isConnected) setTimeout(release, 20);
        };
        release();
        setTimeout(() => {
            if (text.value === sent) find("status .widget-html-content", box).textContent =
                "The kernel does not answer. Wait if it runs a cell, or run this cell again if it was restarted.";
        }, PATIENCE);
    };

    // On the window, because JupyterLab handles keys before a box could, and runs the cell on Shift+Enter. One
    // listener serves all boxes, so a removed box leaves none behind.
    const onKey = event => {
        const box = event.target.closest?.(".helpers-chat");
        const isComposing = event.isComposing || event.keyCode === 229; // the key belongs to an input method
        if (!box || isComposing) return;
        const text = find("entry textarea", box);
        // a notebook takes even letters as commands: "dd" would delete the cell
        if (!event.ctrlKey && !event.metaKey && !event.altKey) event.stopPropagation();
        if (event.key === "Escape") {
            const button = [find("stop", box), find("cancel", box)].find(isVisible);
            if (button) button.click();
        } else if (event.key === "Enter" && event.target === text) {
            if (event.shiftKey) return;
            event.preventDefault();
            act("send", box);
        }
    };
    if (!window.helpersChat) window.addEventListener("keydown", onKey, true);
    window.helpersChat = true;

    const copy = async text => {
        try {
            await navigator.clipboard.writeText(text);
        } catch { // some frames allow only the old way
            const field = document.body.appendChild(document.createElement("textarea"));
            field.value = text;
            field.select();
            document.execCommand("copy");
            field.remove();
        }
    };

    root.addEventListener("click", event => {
        const action = Object.keys(ACTIONS).find(name => event.target.closest(".helpers-chat-" + name));
        if (!action) return;
        event.stopPropagation();
        act(action, root);
        focusEntry();
    }, true);

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
            isAsking ||= button.classList.contains("helpers-chat-asks");
            focusEntry();
        }
    });

    // A button that is hidden loses the focus to the page. `settle` then gives it to the field.
    root.addEventListener("focusin", ({target}) => focused = target);

    root.addEventListener("change", () => isAsking ||= find("entry textarea").value.endsWith(ACTIONS.send));

    // The log follows an answer only if it was scrolled to its end, or if the user has just asked.
    const scroll = log => {
        if (isAsking || log.scrollTop > end - 2) log.scrollTop = log.scrollHeight;
        end = log.scrollHeight - log.clientHeight;
        isAsking = false;
    };

    const settle = () => {
        for (const text of root.querySelectorAll("textarea")) text.dir = "auto";
        const log = find("log");
        if (!log) return;
        if (!log.hasAttribute("role")) {
            log.setAttribute("role", "region");
            log.setAttribute("aria-label", "Conversation");
            log.tabIndex = 0; // lets keys scroll it
            new ResizeObserver(settle).observe(log);
            root.setAttribute("role", "group");
            root.setAttribute("aria-label", "Chat");
        }
        find("status")?.setAttribute("role", "status");
        if (isVisible(log)) scroll(log);
        if (focused && !isVisible(focused) && [focused, document.body].includes(document.activeElement)) focusEntry();
    };
    new MutationObserver(settle).observe(root, {childList: true, subtree: true, attributeFilter: ["style"]});
    settle();
})(this.closest(".helpers-chat"));
